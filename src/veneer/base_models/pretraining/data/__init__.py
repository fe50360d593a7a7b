"""Training data of the bundled base models: icons, photos, rendered models, scenes and their captions."""
