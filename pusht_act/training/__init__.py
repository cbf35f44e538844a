"""The training loop and what runs beside it: the only room that updates weights."""
