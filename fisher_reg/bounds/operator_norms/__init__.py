"""Upper bounds of the norms of linear maps and of attention: mathematics of tensors that knows no module rule."""
