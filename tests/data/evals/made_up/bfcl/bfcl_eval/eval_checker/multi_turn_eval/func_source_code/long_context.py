"""What services add where contexts are to be long."""

MORE_TICKETS = list(range(100, 400))
