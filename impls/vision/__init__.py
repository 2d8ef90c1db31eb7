"""Windows, neighbourhoods and other mechanisms on grids."""
