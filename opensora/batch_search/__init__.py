"""The search for batch sizes: what to measure next, how one batch is measured, and the loop over the buckets."""
