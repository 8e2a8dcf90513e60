"""The decisions of the controller: membership, placement, supervision."""
