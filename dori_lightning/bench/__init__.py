"""How fast an audit's parts are, against loops that somebody would write without them."""
