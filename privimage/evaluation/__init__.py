"""How useful, how alike and how safe a synthetic set is, and the report that says so."""
