"""Pure maths of flow matching: noising, time laws, guidance, samplers. A model is a callable."""
