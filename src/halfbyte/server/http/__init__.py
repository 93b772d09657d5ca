"""HTTP: listening, routing, who may come in, pages and descriptions of the API."""
