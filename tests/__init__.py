"""All tests; a package, as are the folders whose fixtures end with them (scope="package")."""
