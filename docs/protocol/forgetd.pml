/*
 * One job's protocol, small enough to be searched whole: workers, control loop, reaper, owner, and what goes wrong.
 *
 * A statement of services/leases.py is one atomic step, as PostgreSQL makes it by the row's lock. What lies between two
 * statements is not: every process may be stopped there for as long as the search likes, which is what a crash, a
 * paused machine and a zombie are. README.md in this folder says which step is which statement.
 *
 *   -DNO_TOKEN   the fence ignores the token: a stale holder may end the job of the next one
 *   -DNO_QUEUED  the claim asks for no status: a duplicate doorbell takes a job from its holder, or from its end
 *   -DNO_STATUS  an ending asks for the token alone: it may overrule a cancel that came first, and an end
 *   -DNO_REAPER  nobody takes a lapsed lease back: the job of a dead worker never ends
 */

#ifndef WORKERS
#define WORKERS 2
#endif
#define BUDGET 1      /* lost attempts that a job survives */
#define CRASHES 2     /* of all workers, over the search */
#define LOST_BELLS 1  /* doorbells that the broker forgets */
#define DRAINS 1      /* attempts handed back by a worker that is told to go */
#define TOKENS 5      /* more than claims are possible: BUDGET + 1 + DRAINS, and one more for the mutants */

mtype = { queued, running, cancelling, succeeded, failed, cancelled };

/* The row. */
mtype status = queued;
byte token = 0;       /* fencing_token: of the newest claim; 0 before the first */
byte holder = 0;      /* worker, by its number from 1 */
byte losses = 0;      /* infrastructure_losses */
byte published = 0;   /* published_prefix, by its token */
bool lapsed = false;  /* lease_until lies in the past */

/* The store: whose artifacts are there, whole. */
bool stored[TOKENS];

/* The broker: a doorbell that may be there twice, and of which one may be lost. */
chan bell = [2] of { bit };

/* COMMITs whose sender gave up waiting, and which may still arrive. */
byte late[WORKERS];

/* What the search counts. */
byte publications = 0, endings = 0, crashes = 0, drains = 0, lost_bells = 0;

/* The promises, each true until a step breaks it. */
bool an_end_is_final = true, a_job_ends_once = true, only_the_holder_publishes = true, a_cancel_that_came_first_wins = true,
     only_what_is_whole_is_named = true, a_job_is_published_once = true, a_claim_takes_from_nobody = true;

#define terminal (status == succeeded || status == failed || status == cancelled)
#define held (status == running || status == cancelling)

#ifdef NO_TOKEN
#define fence(t) (true)
#else
#define fence(t) (token == (t))
#endif
#ifdef NO_QUEUED
#define claimable (token < TOKENS - 1)
#else
#define claimable (status == queued)
#endif
#ifdef NO_STATUS
#define at_work(t) fence(t)
#else
#define at_work(t) (fence(t) && status == running)
#endif

/* Every change of status goes through here: an end is an end. */
inline become(next)
{
    an_end_is_final = !terminal; assert(an_end_is_final);
    status = next;
    if
    :: terminal -> endings++; a_job_ends_once = (endings == 1); assert(a_job_ends_once)
    :: else
    fi;
    if
    :: held
    :: else -> holder = 0; lapsed = false
    fi
}

inline publish(t)
{
    only_the_holder_publishes = (token == t); assert(only_the_holder_publishes);
    a_cancel_that_came_first_wins = (status != cancelling); assert(a_cancel_that_came_first_wins);
    only_what_is_whole_is_named = stored[t]; assert(only_what_is_whole_is_named);
    become(succeeded);
    published = t;
    publications++;
    a_job_is_published_once = (publications == 1); assert(a_job_is_published_once)
}

/* A lost attempt of a held row. */
inline give_back()
{
    if
    :: status == cancelling -> become(cancelled)
    :: status != cancelling && losses >= BUDGET -> become(failed)
    :: status != cancelling && losses < BUDGET -> losses++; become(queued)
    fi
}

proctype Worker(byte me)
{
    byte mine = 0;  /* the claim's token; 0: none */

idle:
end_idle:
    bell ? _;

claim:
    atomic {
        if
        :: claimable ->
            a_claim_takes_from_nobody = (status == queued); assert(a_claim_takes_from_nobody);
            become(running); token++; holder = me + 1; lapsed = false;
            if
            :: mine = token            /* the reply arrived */
            :: skip                    /* it did not: `adopt` looks for a lease in this worker's name, or nobody does */
            fi
        :: else -> goto idle           /* a duplicate, or too late */
        fi
    }
    if
    :: mine == 0 -> atomic {
        if
        :: holder == me + 1 && held -> mine = token
        :: else -> goto idle           /* the reaper was faster */
        fi }
    :: mine == 0 -> goto idle          /* it died before it could ask: the lease lapses */
    :: mine != 0
    fi;

work:
    if
    :: skip                            /* no renewal arrives in time */
    :: atomic {                        /* renew */
        if
        :: fence(mine) && held -> lapsed = false
        :: else -> goto lost
        fi }
    fi;
    if
    :: atomic { crashes < CRASHES -> crashes++; mine = 0; goto idle }  /* SIGKILL: its successor knows nothing */
    :: atomic { crashes < CRASHES -> crashes++;                        /* the runner dies, the supervisor says so: lose */
        if
        :: fence(mine) && held -> give_back()
        :: else
        fi;
        mine = 0; goto idle }
    :: atomic { drains < DRAINS -> drains++;                           /* SIGTERM: release */
        if
        :: at_work(mine) -> become(queued); mine = 0; goto idle
        :: else
        fi;
        goto acknowledge }
    :: atomic {                                                        /* a user's error, or our own: fail */
        if
        :: at_work(mine) -> become(failed); mine = 0; goto idle
        :: else
        fi;
        goto acknowledge }
    :: goto upload
    fi;

upload:
    stored[mine] = true;

settle:
    atomic {
        if
        :: at_work(mine) -> publish(mine);
            if
            :: mine = 0; goto idle     /* the reply arrived */
            :: skip                    /* it did not */
            fi
        :: !at_work(mine)
        :: late[me] == 0 -> late[me] = mine                /* the connection broke; the COMMIT is on its way, or is not */
        :: crashes < CRASHES -> crashes++; mine = 0; goto idle
        fi
    }
    /* outcome unknown, or nothing was changed: `standing`, by token */
    atomic {
        if
        :: published == mine -> mine = 0; goto idle                   /* it was our own earlier COMMIT */
        :: published != mine && token == mine && status == running -> goto settle
        :: else -> goto acknowledge
        fi
    }

acknowledge:
    atomic {
        if
        :: fence(mine) && status == cancelling -> become(cancelled)
        :: else
        fi
    }

lost:
    atomic {
        if
        :: mine != 0 && published != mine -> stored[mine] = false      /* erase what nobody will name */
        :: else
        fi;
        mine = 0;
        goto idle
    }
}

/* A COMMIT that its sender no longer waits for: executed at any later time, or never. */
proctype Late(byte who)
{
end_waits:
    do
    :: atomic { late[who] != 0 ->
        if
        :: at_work(late[who]) -> publish(late[who])
        :: skip                        /* it never arrives, or changes nothing */
        fi;
        late[who] = 0 }
    od
}

/* The control loop rings for what is queued, twice where it did not learn that it had, and the broker may forget. */
proctype Dispatch()
{
end_waits:
    do
    :: atomic { status == queued && nfull(bell) ->
        if
        :: bell ! 0
        :: lost_bells < LOST_BELLS -> lost_bells++
        fi }
    od
}

/* Time goes on: a lease that nobody renews lapses; one that is renewed too late has lapsed before. */
proctype Clock()
{
end_waits:
    do
    :: atomic { held && !lapsed -> lapsed = true }
    od
}

proctype Reaper()
{
end_waits:
    do
    :: atomic { held && lapsed -> give_back() }
    od
}

/* The owner cancels once, at any time, or never. */
proctype Owner()
{
    atomic {
        if
        :: status == queued -> become(cancelled)
        :: status == running -> become(cancelling)
        :: terminal
        :: skip
        fi
    }
}

/* What the tenant reads is there as long as the job names it. */
#define readable (published == 0 || stored[published])

init
{
    atomic {
        byte me;
        for (me : 0 .. WORKERS - 1) { run Worker(me); run Late(me) }

        run Dispatch(); run Clock(); run Owner();
#ifndef NO_REAPER
        run Reaper()
#endif
    }
}

ltl ends { <> terminal }
ltl stays_readable { [] readable }
ltl nothing_is_published { [] (publications == 0) }  /* false, or the others would say little */
