"""What a run is and what it leaves behind: recipes, schedules, metrics, logs, checkpoints and the trainer."""
