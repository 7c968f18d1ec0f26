//go:build tools

// The programs of a kubeadm node as released, built from their Go modules: what the kubeadm walk-through is run on.
// Nothing is built from this file: it holds the modules' list to what the programs import.
package node

import (
	_ "k8s.io/kubernetes/cmd/kube-controller-manager"
	_ "k8s.io/kubernetes/cmd/kube-scheduler"
	_ "k8s.io/kubernetes/cmd/kubeadm"
	_ "k8s.io/kubernetes/cmd/kubectl"
	_ "k8s.io/kubernetes/cmd/kubelet"
)
