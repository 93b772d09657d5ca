"""What requests of four APIs mean, and how answers to them are worded."""
