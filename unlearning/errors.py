"""The refusals of this room: parameters, inputs, states, and a run that went astray."""


class UnlearningError(ValueError):
    """An unlearning run cannot start or go on."""


class ParameterError(UnlearningError):
    """A parameter is unknown, of the wrong type or out of range.

    Attributes:
        name: the parameter.
        message: what is wrong with it, with the value.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message


class InputError(UnlearningError):
    """The images or the flow cannot be used: their shape, type or number is wrong, or nothing is left to remember."""


class StateError(UnlearningError):
    """A saved state is damaged or belongs to another run: start that run afresh."""


class FisherError(UnlearningError):
    """A stored Fisher information is damaged, of other weights, or lacks parameters: compute it for this model."""


class DivergedError(UnlearningError):
    """A loss or a gradient was not finite; the run was stopped: lower the learning rate."""


class NotEnoughMemoryError(UnlearningError):
    """A run does not fit into memory, one row at a time: train fewer weights, keep smaller moments, or go elsewhere.

    Attributes:
        needed: bytes by the estimate; None where one row was already too much to be measured.
        available: bytes that there are.
        held: bytes that are needed without any pass.
    """

    def __init__(self, needed: int | None, available: int, held: int) -> None:
        of = f"more than {max(held, available):,}" if needed is None else f"{needed:,}"
        super().__init__(f"the run needs {of} bytes beside its model, one row at a time, and there are {available:,}")
        self.needed, self.available, self.held = needed, available, held


class ProcessError(UnlearningError):
    """The processes of a run do not belong together, or one of them failed: see what that one says."""


class UnreachableError(UnlearningError):
    """Fractions that steering cannot reach from this base: ask for less, or for bounds that can hold together.

    Attributes:
        constraint: the constraint whose class that is; None where several only fail together.
        class_name: the class that is asked for and not shown, or furthest from its bounds; where only several classes,
            or classes of several constraints at once, tell what is missing, all of them in words.
        measured: its fraction among samples of the base.
        n: how many samples that was measured on.
        upper: upper confidence bound of its fraction.
    """

    def __init__(
        self,
        message: str,
        *,
        constraint: str | None = None,
        class_name: str | None = None,
        measured: float | None = None,
        n: int | None = None,
        upper: float | None = None,
    ) -> None:
        super().__init__(message)
        self.constraint = constraint
        self.class_name = class_name
        self.measured = measured
        self.n = n
        self.upper = upper
