"""Every setting of every process, read once from ``FORGETD_*`` environment variables."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.logs import Level, Style

__all__ = ["Settings", "get_settings"]

MIB = 2**20
GIB = 2**30


class Settings(BaseSettings):
    """Settings with their units in the names. The three URLs decide where the service lives; the rest has defaults."""

    # Built where it is first read: importing the gateway reads none.
    model_config = SettingsConfigDict(env_prefix="FORGETD_", extra="ignore", defer_build=True)

    # Where things are.
    database_url: SecretStr = Field(description="postgresql+psycopg://user:password@host:port/database")
    broker_url: SecretStr = Field(description="redis://:password@host:port/0 (Valkey or Redis)")
    s3_endpoint_url: str | None = Field(default=None, description="unset: the AWS endpoint of the region")
    s3_public_endpoint_url: str | None = Field(
        default=None, description="the endpoint in presigned URLs, where callers reach the store by another name"
    )
    s3_access_key: SecretStr | None = None
    s3_secret_key: SecretStr | None = None
    s3_region: str = "us-east-1"
    s3_bucket: str = "forgetd"
    scratch_dir: Path = Field(default=Path("/tmp/forgetd-scratch"), description="attempts work here, mode 0700")  # noqa: S108 created 0700, owner checked

    # The job protocol (docs/architecture.md).
    lease_ttl_seconds: float = Field(default=30.0, gt=0)
    ring_seconds: float = Field(default=5.0, gt=0, description="an unanswered doorbell is rung again after this")
    control_interval_seconds: float = Field(default=0.2, gt=0)
    cancel_grace_seconds: float = Field(default=10.0, gt=0, description="SIGTERM to SIGKILL of a cancelled runner")
    drain_grace_seconds: float = Field(default=45.0, gt=0, description="SIGTERM to SIGKILL of a draining runner")
    runner_silence_seconds: float = Field(default=3600.0, gt=0, description="a runner that says nothing is killed")
    stall_seconds: float = Field(
        default=900.0, gt=0, description="a worker that waits this long for a call that does not return ends itself"
    )
    store_patience_seconds: float = Field(
        default=600.0, gt=0, description="a worker that cannot fetch a job's inputs for so long gives it to another"
    )
    infrastructure_budget: int = Field(default=5, ge=0, description="lost attempts before a job fails")
    out_of_memory_budget: int = Field(default=2, ge=0, description="retries at half the micro-batch each")
    tenant_running_jobs: int | None = Field(default=None, ge=1, description="of a tenant at once, on all workers")
    tenant_open_jobs: int = Field(default=1000, ge=1, description="of a tenant that have not ended, imports included")
    gpus_per_job: int = Field(default=1, ge=1, le=64, description="that Selective Amnesia may train on at once")
    import_memory_bytes: int = Field(default=8 * GIB, gt=0, description="address space of the converter, over its base")
    import_cpu_seconds: int = Field(default=900, gt=0)

    # What callers may send and how long links live.
    max_checkpoint_bytes: int = Field(default=20 * GIB, gt=0)
    max_classifier_bytes: int = Field(default=256 * MIB, gt=0, le=512 * MIB)
    max_image_bytes: int = Field(default=25 * MIB, gt=0)
    max_image_pixels: int = Field(default=40_000_000, gt=0)
    max_image_set_bytes: int = Field(default=2 * GIB, gt=0)
    max_image_set_count: int = Field(default=20_000, gt=0)
    max_json_bytes: int = Field(default=1 * MIB, gt=0)
    presign_seconds: int = Field(default=900, gt=0, le=3600)
    image_set_hours: float = Field(default=24.0, gt=0, le=24.0, description="hard cap on the life of uploaded images")

    # What the processes tell their operator.
    metrics_token: SecretStr | None = Field(default=None, description="what GET /metrics asks for; unset: nothing")
    log_format: Style = "line"
    log_level: Level = "INFO"
    otlp_endpoint: str | None = Field(default=None, description="http://collector:4318; unset: no traces")

    @field_validator("metrics_token", "otlp_endpoint", mode="before")
    @classmethod
    def _nothing_is_unset(cls, value: object) -> object:
        return None if value == "" else value  # as compose files hand on what is not set

    @model_validator(mode="after")
    def _lease_outlives_the_grace_of_renewal(self) -> Settings:
        if self.lease_ttl_seconds < 4 * self.control_interval_seconds:
            raise ValueError("lease_ttl_seconds must be at least four control intervals")
        return self


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The process's settings; raises ``pydantic.ValidationError`` naming each variable that is missing or wrong."""
    return Settings()
