"""The ``forgetd`` command and the Python client."""
