"""What training adds to the task loss: one file per family of losses."""
