"""What measures Milliways and breaks it; and how the demo model was made."""
