"""What the method need not explain: reading corpora, loading backbones, folders on disk, the command line."""
