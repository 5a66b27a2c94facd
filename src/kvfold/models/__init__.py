"""Models: where they come from, and how kvfold's attention gets into them."""
