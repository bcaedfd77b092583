"""What a training run will need before it is started: shapes, recipes, and a plan of memory, arithmetic and hours."""
