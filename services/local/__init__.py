"""The embedded servers: real PostgreSQL, Valkey and SeaweedFS from wheels, under one private folder."""

from services.local.server import LocalServerError
from services.local.stack import LocalStack, LocalUrls

__all__ = ["LocalServerError", "LocalStack", "LocalUrls"]
