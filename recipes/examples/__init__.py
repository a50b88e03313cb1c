"""The penalty and the measurement in training loops other than Lightning's Trainer: one short file per loop."""
