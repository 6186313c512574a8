"""Images that stages run in: references, registries, credentials, squashfs files."""
