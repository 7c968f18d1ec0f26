package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync/atomic"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// kubelet is a light one: what a hollow kubelet of k8s.io/kubernetes/cmd/kubemark was seen to ask, and nothing else.
type kubelet struct {
	name   string
	client *kubernetes.Clientset
	open   atomic.Int32
}

// limit is how long a request may take (kubelet's --node-status-update-frequency).
const limit = 10 * time.Second

// leaseNamespace is where kubelets have their Leases.
const leaseNamespace = "kube-node-lease"

func newKubelet(name string, g *group, authority *authority) (*kubelet, error) {
	certificate, key, err := authority.sign("system:node:"+name, "system:nodes")
	if err != nil {
		return nil, err
	}
	k := &kubelet{name: name}
	config := &rest.Config{
		Host:            g.server,
		UserAgent:       "hollow-kubelet",
		QPS:             50,
		Burst:           100,
		TLSClientConfig: rest.TLSClientConfig{CAData: authority.pem, CertData: certificate, KeyData: key},
		// A dial function of its own also keeps client-go from sharing one connection among clients.
		Dial: g.figures.dial,
	}
	config.ContentType = runtime.ContentTypeProtobuf
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return &timer{next: next, figures: g.figures, open: &k.open}
	})
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, err
	}
	if k.client, err = kubernetes.NewForConfigAndClient(config, client); err != nil {
		return nil, err
	}
	return k, nil
}

// run registers its node, opens its five watches, and renews and reports for as long as it lives.
func (k *kubelet) run(ctx context.Context, o options) {
	for {
		limited, cancel := context.WithTimeout(ctx, limit)
		_, err := k.client.CoreV1().Nodes().Create(limited, k.node(), metav1.CreateOptions{})
		cancel()
		if err == nil || apierrors.IsAlreadyExists(err) {
			break
		}
		if !sleep(ctx, 200*time.Millisecond) {
			return
		}
	}
	core, storage, node := k.client.CoreV1().RESTClient(), k.client.StorageV1().RESTClient(), k.client.NodeV1().RESTClient()
	reflect(ctx, core, "nodes", fields.OneTermEqualSelector("metadata.name", k.name), &corev1.Node{})
	reflect(ctx, core, "services", fields.OneTermNotEqualSelector("spec.clusterIP", "None"), &corev1.Service{})
	reflect(ctx, core, "pods", fields.OneTermEqualSelector("spec.nodeName", k.name), &corev1.Pod{})
	reflect(ctx, storage, "csidrivers", fields.Everything(), &storagev1.CSIDriver{})
	reflect(ctx, node, "runtimeclasses", fields.Everything(), &nodev1.RuntimeClass{})
	go k.report(ctx, o.status)
	k.renew(ctx, o.lease)
}

func reflect(ctx context.Context, client rest.Interface, resource string, selector fields.Selector, object runtime.Object) {
	source := cache.NewListWatchFromClient(client, resource, metav1.NamespaceAll, selector)
	store := cache.NewStore(cache.MetaNamespaceKeyFunc)
	reflector := cache.NewReflectorWithOptions(source, object, store, cache.ReflectorOptions{Name: resource})
	go reflector.RunWithContext(ctx)
}

// renew keeps the node's Lease as k8s.io/component-helpers/apimachinery/lease does: the last answer is changed and sent back,
// at once again when it failed, five times at most; up to 4 % late.
func (k *kubelet) renew(ctx context.Context, period time.Duration) {
	leases := k.client.CoordinationV1().Leases(leaseNamespace)
	var last *coordinationv1.Lease
	for {
		if last == nil {
			last = k.lease(ctx, period)
		} else {
			for range 5 {
				limited, cancel := context.WithTimeout(ctx, limit)
				last.Spec.RenewTime = &metav1.MicroTime{Time: time.Now()}
				renewed, err := leases.Update(limited, last, metav1.UpdateOptions{})
				if err == nil {
					last = renewed
				} else if apierrors.IsConflict(err) {
					if current, err := leases.Get(limited, k.name, metav1.GetOptions{}); err == nil {
						last = current
					}
				}
				cancel()
				if err == nil {
					break
				}
			}
		}
		if !sleep(ctx, period+time.Duration(rand.Float64()*0.04*float64(period))) {
			return
		}
	}
}

// lease is the node's own, made where there is none; nil when it cannot be had.
func (k *kubelet) lease(ctx context.Context, period time.Duration) *coordinationv1.Lease {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	leases := k.client.CoordinationV1().Leases(leaseNamespace)
	found, err := leases.Get(limited, k.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		seconds := int32(4 * period / time.Second)
		found, err = leases.Create(limited, &coordinationv1.Lease{
			ObjectMeta: metav1.ObjectMeta{Name: k.name, Namespace: leaseNamespace},
			Spec: coordinationv1.LeaseSpec{
				HolderIdentity:       &k.name,
				LeaseDurationSeconds: &seconds,
				RenewTime:            &metav1.MicroTime{Time: time.Now()},
			},
		}, metav1.CreateOptions{})
	}
	if err != nil {
		return nil
	}
	return found
}

var conditions = []struct {
	kind            corev1.NodeConditionType
	status          corev1.ConditionStatus
	reason, message string
}{
	{corev1.NodeMemoryPressure, corev1.ConditionFalse, "KubeletHasSufficientMemory", "kubelet has sufficient memory available"},
	{corev1.NodeDiskPressure, corev1.ConditionFalse, "KubeletHasNoDiskPressure", "kubelet has no disk pressure"},
	{corev1.NodePIDPressure, corev1.ConditionFalse, "KubeletHasSufficientPID", "kubelet has sufficient PID available"},
	{corev1.NodeReady, corev1.ConditionTrue, "KubeletReady", "kubelet is posting ready status"},
}

// report patches the node's status, the first time somewhere within the first period and a half.
func (k *kubelet) report(ctx context.Context, period time.Duration) {
	pause := time.Duration(rand.Float64() * (0.5 + rand.Float64()) * float64(period))
	for sleep(ctx, pause) {
		pause = period
		now := time.Now().UTC().Format(time.RFC3339)
		beats := []map[string]string{}
		for _, condition := range conditions {
			beats = append(beats, map[string]string{"type": string(condition.kind), "lastHeartbeatTime": now})
		}
		// Strings alone: it cannot fail.
		patch, _ := json.Marshal(map[string]any{"status": map[string]any{"conditions": beats}})
		limited, cancel := context.WithTimeout(ctx, limit)
		// Its failure is counted by the transport.
		_, _ = k.client.CoreV1().Nodes().Patch(limited, k.name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
		cancel()
	}
}

// node is as large as a hollow kubelet's.
func (k *kubelet) node() *corev1.Node {
	now := metav1.Now()
	resources := corev1.ResourceList{}
	for name, amount := range map[corev1.ResourceName]string{"cpu": "1", "memory": "3840Mi", "pods": "110", "ephemeral-storage": "0"} {
		resources[name] = resource.MustParse(amount)
	}
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{
			Name: k.name,
			Labels: map[string]string{
				"kubernetes.io/hostname": k.name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
				"beta.kubernetes.io/os": "linux", "beta.kubernetes.io/arch": "amd64",
			},
			Annotations: map[string]string{"volumes.kubernetes.io/controller-managed-attach-detach": "true"},
		},
		Spec: corev1.NodeSpec{ProviderID: fmt.Sprintf("kubemark://%s", k.name)},
		Status: corev1.NodeStatus{
			Capacity:    resources,
			Allocatable: resources,
			Addresses:   []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: k.name}},
			NodeInfo: corev1.NodeSystemInfo{
				KernelVersion: "3.16.0-0.bpo.4-amd64", OSImage: "Debian GNU/Linux 7 (wheezy)",
				ContainerRuntimeVersion: "fakeRuntime://0.1.0", KubeletVersion: "v1.36.2",
				OperatingSystem: "linux", Architecture: "amd64",
			},
		},
	}
	for _, condition := range conditions {
		node.Status.Conditions = append(node.Status.Conditions, corev1.NodeCondition{
			Type: condition.kind, Status: condition.status, Reason: condition.reason, Message: condition.message,
			LastHeartbeatTime: now, LastTransitionTime: now,
		})
	}
	return node
}
