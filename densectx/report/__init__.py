"""A run as one static HTML file: curves, scores, pictures, config, without a request to anywhere."""
