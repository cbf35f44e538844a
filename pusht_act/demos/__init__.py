"""The scripted PushT demonstrator and the demonstrations that come with the package."""
