"""Reading compiled programs: collectives, products, memory."""
