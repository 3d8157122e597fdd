"""The router's mind and its socket towards workers: who is here, which attempts live, what to send to whom."""
