"""Plans: the 2D and 2.5D configurations and the planner that writes them."""
