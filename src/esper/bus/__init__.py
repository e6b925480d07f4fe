"""How events travel from who makes them to who reads them."""
