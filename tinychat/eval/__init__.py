"""How good a model is: tasks with known answers, and what quantizing costs."""
