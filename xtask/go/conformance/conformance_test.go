// Package conformance runs the official Gateway API conformance suite. Between the suite's set-up and its tests it gives
// the suite's namespace a waypoint, as a user of the mesh would.
package conformance

import (
	"context"
	"flag"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gateway "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/gateway-api/conformance"
	"sigs.k8s.io/gateway-api/conformance/tests"
	"sigs.k8s.io/gateway-api/conformance/utils/suite"
	"sigs.k8s.io/yaml"
)

const (
	waypointName     = "waypoint"
	waypointDeadline = 3 * time.Minute
	// The mesh carries HBONE on this port of a waypoint.
	waypointPort = 15008
)

var waypointClass = flag.String("waypoint-class", "",
	"GatewayClass of the waypoint that the suite's namespace gets; none if empty")

func TestConformance(t *testing.T) {
	options := conformance.DefaultOptions(t)
	checks, err := suite.NewConformanceTestSuite(options)
	require.NoError(t, err, "the suite refuses its options")
	if options.ReportOutputPath != "" {
		t.Cleanup(func() { writeReport(t, checks, options.ReportOutputPath) })
	}
	checks.Setup(t, tests.ConformanceTests)
	if *waypointClass != "" {
		useWaypoint(t, options.Client, suite.MeshNamespace)
	}
	require.NoError(t, checks.Run(t, tests.ConformanceTests))
}

// useWaypoint makes a waypoint for all services of a namespace and waits until it is programmed.
func useWaypoint(t *testing.T, api client.Client, namespace string) {
	ctx, cancel := context.WithTimeout(context.Background(), waypointDeadline)
	defer cancel()
	waypoint := &gateway.Gateway{
		ObjectMeta: metav1.ObjectMeta{
			Name:      waypointName,
			Namespace: namespace,
			Labels:    map[string]string{"istio.io/waypoint-for": "service"},
		},
		Spec: gateway.GatewaySpec{
			GatewayClassName: gateway.ObjectName(*waypointClass),
			Listeners:        []gateway.Listener{{Name: "mesh", Port: waypointPort, Protocol: "HBONE"}},
		},
	}
	require.NoError(t, client.IgnoreAlreadyExists(api.Create(ctx, waypoint)), "create the waypoint")

	key := client.ObjectKeyFromObject(waypoint)
	err := wait.PollUntilContextCancel(ctx, time.Second, true, func(ctx context.Context) (bool, error) {
		if err := api.Get(ctx, key, waypoint); err != nil {
			return false, client.IgnoreNotFound(err)
		}
		return meta.IsStatusConditionTrue(waypoint.Status.Conditions, string(gateway.GatewayConditionProgrammed)), nil
	})
	require.NoError(t, err, "the waypoint is not programmed: %+v", waypoint.Status.Conditions)

	var space corev1.Namespace
	require.NoError(t, api.Get(ctx, client.ObjectKey{Name: namespace}, &space))
	before := space.DeepCopy()
	if space.Labels == nil {
		space.Labels = map[string]string{}
	}
	space.Labels["istio.io/use-waypoint"] = waypointName
	require.NoError(t, api.Patch(ctx, &space, client.MergeFrom(before)), "label the namespace")
}

func writeReport(t *testing.T, checks *suite.ConformanceTestSuite, file string) {
	report, err := checks.Report()
	require.NoError(t, err, "make the report")
	text, err := yaml.Marshal(report)
	require.NoError(t, err, "write the report as YAML")
	require.NoError(t, os.WriteFile(file, text, 0o644))
}
