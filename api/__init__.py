"""The gateway: routes, wire schemas, problems and authentication. Never imports torch."""
