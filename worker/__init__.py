"""One rank's life under Ray: the actor, its parts, its loops, its line to the router. No driver, no HTTP."""
