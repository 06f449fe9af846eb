package load

// Figures that results have besides: of loads, and of what went on beside them.
const (
	FigureBefore  = "RSS MiB before"
	FigureChurned = "RSS MiB after the last connection"

	FigureBeside  = "GB/s beside"                    // of elephants
	FigureOthers  = "connections or requests beside" // of a neighbour, well-behaved or not
	FigureEffect  = "ms until a change takes effect, median"
	FigureEffects = "ms until a change takes effect, longest"
	FigureMissed  = "changes without effect before the next"
	FigureAgainst = "connections decided against a policy that had taken effect"
	FigureChanges = "changes per second"
	FigurePushes  = "responses of the control plane per second"
	FigureDone    = "s until it was done" // that which went on beside
)

// ControlPlane is the name of its process among those that are measured.
const ControlPlane = "ambitd"

// Agent is what the names of nodes' agents begin with.
const Agent = "ambit-node"
