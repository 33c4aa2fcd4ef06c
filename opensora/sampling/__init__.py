"""From prompts to clips: prompt syntax, references, the sampling pipeline, and how clips are written and shown."""
