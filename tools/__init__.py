"""Programs for those who work on vmmigrate: they draw, check, record and break."""
