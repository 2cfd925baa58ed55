"""Ray: the one door to it. Places workers, hands out clients that keep the promises of `rooms.py`, owns every wait.

Workers are plain classes of their rooms; `hosts` alone makes actors of them. References never leave this room."""
