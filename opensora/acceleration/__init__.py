"""How a model is spread over ranks and how its memory is saved; none of it changes what is computed."""
