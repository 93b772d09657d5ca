"""How fast a server answers under load: traffic, the client that sends it, figures, a page."""
