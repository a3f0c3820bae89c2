"""LIFL on Kubernetes with Knative: images, objects, deployment, the platform's installation and its autoscaler."""
