"""The lean body: known architectures keep less of their layers' activations, on the instance that is trained."""
