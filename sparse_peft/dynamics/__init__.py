"""Building blocks of a method's dynamics: protocol, records, optimizer state, processes."""
