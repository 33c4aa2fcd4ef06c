"""What the quickstart needs besides the product: an object store on this machine, and real clips."""
