package main

import (
	_ "unsafe" // for go:linkname

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/component-base/metrics"
	_ "k8s.io/component-base/metrics/legacyregistry" // what is linked to
)

// Kubelets register their collectors in registries of the process, and end it when one is there already. Here the second
// kubelet's count for the first's.

//go:linkname kubernetesRegistry k8s.io/component-base/metrics/legacyregistry.defaultRegistry
var kubernetesRegistry metrics.KubeRegistry

type many struct{ metrics.KubeRegistry }

func (m many) MustRegister(all ...metrics.Registerable) {
	for _, one := range all {
		_ = m.Register(one)
	}
}

func (m many) CustomMustRegister(all ...metrics.StableCollector) {
	for _, one := range all {
		_ = m.CustomRegister(one)
	}
}

type manyOf struct{ prometheus.Registerer }

func (m manyOf) MustRegister(all ...prometheus.Collector) {
	for _, one := range all {
		_ = m.Register(one)
	}
}

func init() {
	kubernetesRegistry = many{kubernetesRegistry}
	prometheus.DefaultRegisterer = manyOf{prometheus.DefaultRegisterer}
}
