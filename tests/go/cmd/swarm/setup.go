package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

const (
	// clientsGroup is the group that the clients' certificates and tokens name.
	clientsGroup = "swarm-clients"
	// hotObject is the configmap that the writer changes; sequenceKey the entry that holds the number.
	hotObject   = "object-0"
	sequenceKey = "number"
)

// prepare makes what the clients work on: a namespace, the right to it, and the objects.
//
// An apiserver that has just started refuses some of this for a moment (its own RBAC rules and namespaces
// are still being made), so each step is tried again for up to a minute.
func prepare(ctx context.Context, config *rest.Config, namespace string, objects int) error {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	meta := metav1.ObjectMeta{Name: namespace}
	err = persist(ctx, func() error {
		_, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: meta}, metav1.CreateOptions{})
		return err
	})
	if err != nil {
		return fmt.Errorf("namespace: %w", err)
	}
	// Not the ClusterRole "admin": its rules are gathered by the controller manager, which does not run here.
	role := &rbacv1.Role{
		ObjectMeta: metav1.ObjectMeta{Name: clientsGroup, Namespace: namespace},
		Rules: []rbacv1.PolicyRule{{
			APIGroups: []string{""}, Resources: []string{"configmaps"}, Verbs: []string{"get", "list", "watch", "update"},
		}},
	}
	err = persist(ctx, func() error {
		_, err := client.RbacV1().Roles(namespace).Create(ctx, role, metav1.CreateOptions{})
		return err
	})
	if err != nil {
		return fmt.Errorf("role: %w", err)
	}
	binding := &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: clientsGroup, Namespace: namespace},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: clientsGroup},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: clientsGroup}},
	}
	err = persist(ctx, func() error {
		_, err := client.RbacV1().RoleBindings(namespace).Create(ctx, binding, metav1.CreateOptions{})
		return err
	})
	if err != nil {
		return fmt.Errorf("role binding: %w", err)
	}
	for i := range objects {
		object := &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: "object-" + strconv.Itoa(i), Namespace: namespace},
			Data:       map[string]string{sequenceKey: "0"},
		}
		err := persist(ctx, func() error {
			_, err := client.CoreV1().ConfigMaps(namespace).Create(ctx, object, metav1.CreateOptions{})
			return err
		})
		if err != nil {
			return fmt.Errorf("configmap %s: %w", object.Name, err)
		}
	}
	return nil
}

func persist(ctx context.Context, create func() error) error {
	var last error
	err := wait.PollUntilContextTimeout(ctx, 250*time.Millisecond, time.Minute, true, func(context.Context) (bool, error) {
		last = create()
		if last == nil || apierrors.IsAlreadyExists(last) {
			last = nil
			return true, nil
		}
		return false, nil
	})
	if last != nil {
		return last
	}
	return err
}
