"""From lists of users' prompts to clean, safe, English, different ones. No model but language
id."""
