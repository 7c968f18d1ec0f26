// hollow runs hollow kubelets of k8s.io/kubernetes/pkg/kubemark, unchanged, in one process: what light kubelets
// (tests/go/cmd/kubelets) are held against.
//
// Each has a connection and a certificate of its own; their container runtime is one fake for all.
// They end with SIGTERM, or when nobody writes to stdin any more.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"go.opentelemetry.io/otel/trace/noop"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	internalapi "k8s.io/cri-api/pkg/apis"
	remote "k8s.io/cri-client/pkg"
	fakeremote "k8s.io/cri-client/pkg/fake"
	cadvisortest "k8s.io/kubernetes/pkg/kubelet/cadvisor/testing"
	"k8s.io/kubernetes/pkg/kubelet/cm"
	"k8s.io/kubernetes/pkg/kubemark"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "hollow:", err)
		os.Exit(1)
	}
}

func run() error {
	server := flag.String("server", "", "HOST:PORT of the apiserver")
	pki := flag.String("pki", "", "directory with ca.crt, and NODE.crt and NODE.key of each")
	name := flag.String("name", "hollow", "what their nodes' names begin with")
	count := flag.Int("count", 10, "how many")
	ramp := flag.Duration("ramp", 10*time.Second, "time within which all of them come")
	status := flag.Duration("status", 5*time.Minute, "time between two reports of status (nodeStatusReportFrequency)")
	flag.Parse()
	if *server == "" || *pki == "" || *count < 1 {
		return fmt.Errorf("--server, --pki and a --count from 1 on must be given")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	containers, images, err := containerRuntime(ctx)
	if err != nil {
		return err
	}
	for index := range *count {
		node := fmt.Sprintf("%s-%04d", *name, index)
		if err := start(ctx, node, "https://"+*server, *pki, *status, containers, images); err != nil {
			return fmt.Errorf("%s: %w", node, err)
		}
		select {
		case <-time.After(*ramp / time.Duration(*count)):
		case <-ctx.Done():
			return nil
		}
	}
	<-ctx.Done()
	return nil
}

func containerRuntime(ctx context.Context) (internalapi.RuntimeService, internalapi.ImageManagerService, error) {
	endpoint, err := fakeremote.GenerateEndpoint()
	if err != nil {
		return nil, nil, err
	}
	fake := fakeremote.NewFakeRemoteRuntime()
	if err := fake.Start(endpoint); err != nil {
		return nil, nil, err
	}
	containers, err := remote.NewRemoteRuntimeService(ctx, endpoint, 15*time.Second, noop.NewTracerProvider(), false)
	return containers, fake.ImageService, err
}

// start runs one, as cmd/kubemark/app/hollow-node.go does but for what a process can have once.
func start(
	ctx context.Context, node, server, pki string, status time.Duration,
	containers internalapi.RuntimeService, images internalapi.ImageManagerService,
) error {
	config := &rest.Config{
		Host:      server,
		UserAgent: "hollow-kubelet",
		QPS:       50,
		Burst:     100,
		TLSClientConfig: rest.TLSClientConfig{
			CAFile:   filepath.Join(pki, "ca.crt"),
			CertFile: filepath.Join(pki, node+".crt"),
			KeyFile:  filepath.Join(pki, node+".key"),
		},
	}
	config.ContentType = "application/vnd.kubernetes.protobuf"
	shared, err := rest.HTTPClientFor(config)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfigAndClient(config, shared)
	if err != nil {
		return err
	}
	flags, configuration := kubemark.GetHollowKubeletConfig(&kubemark.HollowKubeletOptions{
		NodeName: node, MaxPods: 110, NodeLabels: map[string]string{},
	})
	configuration.EnableServer = false
	configuration.ReadOnlyPort = 0
	// It becomes the process's own limit.
	configuration.MaxOpenFiles = 1_000_000
	// Each would take one of a user's inotify instances, and run iptables once a minute.
	configuration.StaticPodPath = ""
	configuration.MakeIPTablesUtilChains = false
	configuration.NodeStatusReportFrequency.Duration = status
	beats := *config
	beats.Timeout = configuration.NodeStatusUpdateFrequency.Duration
	beats.QPS = -1
	beating := *shared
	beating.Timeout = beats.Timeout
	heartbeat, err := kubernetes.NewForConfigAndClient(&beats, &beating)
	if err != nil {
		return err
	}
	hollow := kubemark.NewHollowKubelet(
		flags, configuration, client, heartbeat, &cadvisortest.Fake{NodeName: node}, images, containers, cm.NewStubContainerManager(),
	)
	go hollow.Run(ctx)
	return nil
}
