"""What a user would write: the ORL faces, and a base flow trained on them."""
