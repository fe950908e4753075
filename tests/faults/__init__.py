"""The fault suite: real processes, killed, stopped and starved; what was lost, what hung. See __main__."""
