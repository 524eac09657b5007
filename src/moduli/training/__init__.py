"""Fine-tuning through the stock Trainer, and what it needs beside it."""
