"""The rows of the metric table, as text: tag | unit | when | source, and the meaning on the line below."""

SCALARS = """
Training/Loss | nats/token | always | evaluation.loss_metrics
    Mean cross-entropy of the supervised tokens of all ranks since the last logged step.
Training/Learning_Rate | | always | runs.metrics
    Learning rate of this update.
Training/Gradient_Norm | | always | runs.metrics
    L2 norm of all trainable gradients before clipping.
Training/Gradient_Norm_Max | | always | runs.metrics
    Highest finite gradient norm before clipping since the last logged step; absent without one.
Training/Epoch | epochs | always | data.packing
    Passes over the training data so far, with fraction.
Training/Token_Accuracy | fraction | always | evaluation.loss_metrics
    Supervised tokens for which the most probable prediction was right.
Training/Final_Loss | nats/token | at the end | runs.metrics
    Training loss of the last logged step.
Thinking/Loss | nats/token | always | evaluation.loss_metrics
    Loss on the chain of thought.
Thinking/Accuracy | fraction | always | evaluation.loss_metrics
    Token accuracy on the chain of thought.
Thinking/Premature_Close_Probability | fraction | always | evaluation.loss_metrics
    Mean probability of </think> inside the chain of thought, where it would cut it short.
Answer/Loss | nats/token | always | evaluation.loss_metrics
    Loss on the answer.
Answer/Accuracy | fraction | always | evaluation.loss_metrics
    Token accuracy on the answer.
Boundary/Close_Loss | nats/token | always | evaluation.loss_metrics
    Loss on the </think> token, which ends the chain of thought.
Boundary/EOS_Loss | nats/token | always | evaluation.loss_metrics
    Loss on the <|im_end|> token, which ends the answer.
Eval/Loss | nats/token | evaluation | evaluation.evaluator
    Loss on the held-out samples.
Eval/Loss_Error | nats/token | evaluation | evaluation.loss_metrics
    Standard error of Eval/Loss over the held-out samples: twice as much either way is an interval of 95%.
Eval/Token_Accuracy | fraction | evaluation | evaluation.evaluator
    Token accuracy on the held-out samples.
Eval/Thinking_Loss | nats/token | evaluation | evaluation.evaluator
    Held-out loss on the chain of thought.
Eval/Answer_Loss | nats/token | evaluation | evaluation.evaluator
    Held-out loss on the answer.
Eval/Close_Loss | nats/token | evaluation | evaluation.evaluator
    Held-out loss on the </think> token.
Eval/EOS_Loss | nats/token | evaluation | evaluation.evaluator
    Held-out loss on the <|im_end|> token.
Eval/Format_Valid_Rate | fraction | judged probes | evaluation.generation
    Generated completions, of those not cut too early to tell, with one closed thinking, answer and end.
Eval/Think_Length_Ratio | | judged probes | evaluation.generation
    Length of the generated chain of thought, where it was closed, over that of the reference.
Eval/Repetition_Rate | fraction | generation probes | evaluation.generation
    Share of the 10-grams of tokens in a generated completion that occurred in it before.
Eval/Term_Recall | fraction | judged probes | evaluation.generation
    Cryptographic terms of the reference answer that the generated answer, not cut too early, has.
Eval/Budget_Hit_Rate | fraction | generation probes | evaluation.generation
    Generated completions that ended only because the token budget did.
Eval/Exact_Answer | fraction | judged probes | evaluation.generation
    Generated answers, not cut too early, with the reference's number, where it has one.
Eval/Answer_Score | fraction | judged probes | evaluation.generation
    How good answers are: 0 without a valid form, else the final number, else the exact facts, else terms.
Eval/Fact_Recall | fraction | judged probes | evaluation.exactness
    Numbers, formulas and cited standards of the reference answer that the generated answer has exactly.
Eval/By_Difficulty_<k> | nats/token | evaluation | evaluation.evaluator
    Held-out loss on samples of difficulty k.
Forgetting/KL_Held_Out | nats/token | measured forgetting | evaluation.forgetting
    KL(base‖tuned) on the first 16,384 held-out tokens (CPU: 4,096): how far the model has moved there.
Forgetting/KL_General | nats/token | measured forgetting | evaluation.forgetting
    KL(base‖tuned) on general text: how far the model has moved where nothing was to be learnt.
Forgetting/General_Loss | nats/token | measured forgetting | evaluation.forgetting
    Loss on the answers of the general text. A rise is what the model has forgotten.
Memory/GPU_Allocated_MB | MB | GPU | runs.metrics
    Device memory held by tensors of this process.
Memory/GPU_Reserved_MB | MB | GPU | runs.metrics
    Device memory reserved by the caching allocator.
Memory/GPU_Peak_MB | MB | GPU | runs.metrics
    Highest allocated memory since the last logged step.
Memory/GPU_Total_MB | MB | GPU | runs.metrics
    Memory of the device.
Memory/GPU_Utilization_Percent | % | GPU | runs.metrics
    Device memory in use by all processes over total. Compute load is GPU_<i>/Utilization_Percent.
Memory/Pressure_Level | level | GPU | runs.metrics
    0 low (under 60% of device memory), 1 moderate (under 80%), 2 high (under 90%), 3 critical.
Memory/Host_RSS_MB | MB | always | monitoring.system_monitor
    Resident memory of this process and of those it has started.
Memory/Host_Percent | % | always | monitoring.system_monitor
    Host memory in use by all processes; of a limit of a container or job where that is fuller.
GPU_<i>/Utilization_Percent | % | GPU | monitoring.system_monitor
    Time in which a kernel ran, mean since the last logged step. High load is not yet high efficiency.
GPU_<i>/Utilization_Percent_Min | % | GPU | monitoring.system_monitor
    Lowest sample of the utilisation since the last logged step.
GPU_<i>/Utilization_Percent_Max | % | GPU | monitoring.system_monitor
    Highest sample of the utilisation since the last logged step.
GPU_<i>/Memory_Usage_Percent | % | GPU | monitoring.system_monitor
    Device memory in use over total.
GPU_<i>/Temperature_C | °C | GPU | monitoring.system_monitor
    Highest core temperature since the last logged step.
GPU_<i>/Temperature_Limit_C | °C | GPU | monitoring.system_monitor
    Temperature at which the device slows down.
GPU_<i>/Power_W | W | GPU | monitoring.system_monitor
    Mean power draw since the last logged step.
GPU_<i>/SM_Clock_MHz | MHz | GPU | monitoring.system_monitor
    Clock of the multiprocessors.
GPU_<i>/Throttle_Reasons | count | GPU | monitoring.system_monitor
    Most reasons at once for which the device was slowed down; 0 is none.
GPU_<i>/ECC_Corrected | errors | GPU with ECC | monitoring.system_monitor
    Memory errors corrected since the driver was loaded.
GPU_<i>/ECC_Uncorrected | errors | GPU with ECC | monitoring.system_monitor
    Memory errors not corrected since the driver was loaded.
GPU_<i>/Energy_J | J | GPU | monitoring.system_monitor
    Energy used since the session's first sample.
System/CPU_Percent | % | always | monitoring.system_monitor
    Load of all host cores.
System/Disk_Free_GB | GB | always | monitoring.system_monitor
    Free space where the run writes.
System/Disk_Read_MBps | MB/s | disk counters | monitoring.system_monitor
    Bytes read from disks by the whole host.
System/Net_MBps | MB/s | network counters | monitoring.system_monitor
    Bytes sent and received by the whole host.
Throughput/Tokens_Per_Second | tokens/s | always | training.step_clock
    All real tokens of all ranks over the time of the steps.
Throughput/Step_Seconds | s | always | training.step_clock
    Mean time of a step, without evaluation and saving.
Throughput/Step_Seconds_Data | s | always | training.step_clock
    Part of the step: waiting for data.
Throughput/Step_Seconds_Forward_Backward | s | always | training.step_clock
    Part of the step: forward and backward pass.
Throughput/Step_Seconds_Optimizer | s | always | training.step_clock
    Part of the step: clipping and update.
Throughput/Step_Seconds_Logging | s | always | training.step_clock
    Part of the step: logging.
Throughput/Straggler_Percent | % | several ranks | runs.metrics
    Slowest rank's own time (data, forward, backward, no waiting) above the median of all ranks.
Throughput/MFU_Percent | % | known GPU | training.step_clock
    Model FLOPs per second over the peak of the device.
Throughput/Tokens_Seen | tokens | always | data.packing
    Real tokens trained on since step 0.
Throughput/Energy_J_Per_1K_Tokens | J/1000 tokens | GPU | training.step_clock
    Energy of all devices for 1000 tokens.
Monitoring/Convergence_Score | 0 to 1 | always | monitoring.convergence
    Rises as the loss settles; 0 up to ten logged losses, for want of evidence.
Monitoring/Convergence_Score_Low | 0 to 1 | always | monitoring.convergence
    Lower end of the score's interval.
Monitoring/Convergence_Score_High | 0 to 1 | always | monitoring.convergence
    Upper end of the score's interval.
Monitoring/Loss_Trend | loss/100 steps | always | monitoring.convergence
    Slope of the loss; negative is falling.
Monitoring/Forecast_Final_Loss | nats/token | always | monitoring.convergence
    Loss expected at the last step.
Monitoring/Forecast_Final_Loss_Low | nats/token | always | monitoring.convergence
    Lower end of the forecast's interval.
Monitoring/Forecast_Final_Loss_High | nats/token | always | monitoring.convergence
    Upper end of the forecast's interval.
Monitoring/Steps_To_99_Percent | steps | always | monitoring.convergence
    Steps until 99% of the forecast fall of the loss, at the mean learning rate so far; may exceed those left.
Monitoring/NonFinite_Steps | steps | once above 0 | runs.metrics
    Updates left out so far because loss or gradient was NaN or infinite.
Monitoring/Resume_Count | | once above 0 | runs.metrics
    How often this run was resumed.
Monitoring/Logging_Overhead_Percent | % | always | runs.metrics
    Time that logged steps took from the training loop: numbers, forecast, alerts and the logger itself.
Monitoring/Alerts_Active | alerts | always | monitoring.alerts
    Alerts that are raised now; each has a chart of its own, Alerts/…, once it was.
Alerts/Gradient_Explosion | 0 or 1 | alerts | monitoring.alerts
    The gradient norm is far above its usual range.
Alerts/Loss_Spike | 0 or 1 | alerts | monitoring.alerts
    The loss is far above its usual range.
Alerts/NonFinite | 0 or 1 | alerts | monitoring.alerts
    Loss or gradient is NaN or infinite.
Alerts/Stagnation | 0 or 1 | alerts | monitoring.alerts
    The loss no longer falls.
Alerts/Memory_Leak | 0 or 1 | alerts | monitoring.alerts
    Memory grows steadily.
Alerts/GPU_Overheat | 0 or 1 | alerts | monitoring.alerts
    A device is hotter than 85 °C.
Alerts/Low_GPU_Utilization | 0 or 1 | alerts | monitoring.alerts
    A device is busy for less than 80% of the time.
Alerts/OOM_Risk | 0 or 1 | alerts | monitoring.alerts
    Memory of a device or of the host is nearly full.
Alerts/Divergence | 0 or 1 | alerts | monitoring.alerts
    The loss has risen for good: above its first ones, its best, or the held-out loss of step 0.
Alerts/Data_Starvation | 0 or 1 | alerts | monitoring.alerts
    Waiting for data takes a large part of the step.
Alerts/Thinking_Collapse | 0 or 1 | alerts | monitoring.alerts
    The generated chains of thought are much shorter than at first and than the reference's, or not closed.
Alerts/Overfitting | 0 or 1 | alerts | monitoring.alerts
    The held-out loss has risen above its best.
Alerts/Forgetting | 0 or 1 | alerts | monitoring.alerts
    The loss on general text has risen above that of the base.
Alerts/Slow_Rank | 0 or 1 | alerts | monitoring.alerts
    One rank holds up all others.
Alerts/Saturation | 0 or 1 | alerts | monitoring.alerts
    Every training token is predicted: the data are learned by heart.
Alerts/Source_Regression | 0 or 1 | alerts | monitoring.alerts
    The loss of one source rises while those of the others fall.
Alerts/Dead_Adapter | 0 or 1 | alerts | monitoring.alerts
    A group of adapters stays at zero while others learn.
Alerts/Clipping | 0 or 1 | alerts | monitoring.alerts
    Nearly every gradient is far longer than the limit it is clipped to.
Config/Batch_Size | | always | runs.metrics
    Rows in a micro-batch; logged anew where out of memory has divided it (below 1: parts of a row).
Config/Sequence_Length | tokens | always | runs.metrics
    Longest sequence.
Config/Gradient_Accumulation_Steps | | always | runs.metrics
    Micro-batches in an update.
Epoch/Average_Loss | nats/token | always | runs.metrics
    Mean training loss of an epoch.
Epoch/Duration_Seconds | s | always | runs.metrics
    Time of an epoch.
Epoch/Steps_Per_Second | steps/s | always | runs.metrics
    Updates per second in an epoch.
Final_Config/batch_size | | at the end | runs.metrics
    Rows in a micro-batch, once more.
Final_Config/learning_rate | | at the end | runs.metrics
    Peak learning rate.
Final_Config/lora_r | | at the end | runs.metrics
    Rank of the adapters.
Final_Config/max_seq_length | | at the end | runs.metrics
    Longest sequence, once more.
Final_Config/num_epochs | | at the end | runs.metrics
    Passes over the training data: as set, or with --max-steps, which ends the run then, what its steps make.
Final_Dataset/<name> | | at the end | runs.metrics
    Numbers of samples: trained on, held out, broken.
Final_Model/<name> | | at the end | runs.metrics
    Size of the model and of its trainable part; first, last and best held-out loss.
Final_Monitoring/Convergence_Score | 0 to 1 | at the end | runs.metrics
    Convergence score at the end.
Final_Monitoring/Forecast_Final_Loss | nats/token | at the end | runs.metrics
    Last forecast.
Final_Monitoring/Loss_Trend | loss/100 steps | at the end | runs.metrics
    Slope of the loss at the end.
Final_GPU_<i>/<name> | | GPU, at the end | runs.gpu_summary
    A device over the whole run: means of the logged steps; _Max: the peak; energy: all of it.
Dataset/Total_Samples | samples | always | analysis.statistics
    Samples that were read.
Dataset/Avg_Instruction_Length | characters | always | analysis.statistics
    Mean length of the questions.
Dataset/Avg_Output_Length | characters | always | analysis.statistics
    Mean length of thinking plus answer.
Dataset/Thinking_Samples_Percent | % | always | analysis.statistics
    Samples with a chain of thought.
Dataset/Avg_Instruction_Quality | 0 to 1 | always | analysis.statistics
    Mean quality of the questions.
Dataset/Avg_Output_Quality | 0 to 1 | always | analysis.statistics
    Mean quality of the outputs; absent where none is in a language that is judged.
Dataset/Avg_Crypto_Complexity | | always | analysis.statistics
    Mean complexity by cryptographic terms.
Dataset/Difficulty_<k>_Count | samples | always | analysis.statistics
    Samples of difficulty k.
Dataset/Difficulty_<k>_Percent | % | always | analysis.statistics
    Share of samples of difficulty k.
Dataset/Quality_Level_<k>_Count | samples | always | analysis.statistics
    Samples of quality level k.
Dataset/Quality_Level_<k>_Percent | % | always | analysis.statistics
    Share of samples of quality level k.
Dataset/Crypto_Terms_<k>_Count | samples | always | analysis.statistics
    Samples with k different cryptographic terms; the last k: so many or more.
LoRA/Gradient_Norm | | evaluation after step 0 | evaluation.adapter_health
    Gradient norm of all adapters before clipping.
"""
# Numbers that would crowd the charts: in metrics.jsonl, from which report.html draws, and in no event file.
DETAILS = """
Training/Perplexity | | always | evaluation.loss_metrics
    exp(Training/Loss).
Training/By_Difficulty_<k> | nats/token | always | evaluation.loss_metrics
    Training loss on samples of difficulty k.
Training/By_Source/<name> | nats/token | always | evaluation.loss_metrics
    Training loss on samples of one source file.
Training/By_Category/<name> | nats/token | always | evaluation.loss_metrics
    Training loss on samples by the category of most of their terms; none: without a term.
Thinking/Tokens_Percent | % | always | evaluation.loss_metrics
    Share of the chain of thought in the supervised tokens.
Thinking/Loss_By_Position_<k> | nats/token | always | evaluation.loss_metrics
    Loss in the k-th tenth of the chain of thought.
Answer/Tokens_Percent | % | always | evaluation.loss_metrics
    Share of the answer in the supervised tokens.
Eval/Format_Valid_Rate_Low | fraction | judged probes | evaluation.exactness
    Lower end of the rate's 95% interval (Wilson).
Eval/Format_Valid_Rate_High | fraction | judged probes | evaluation.exactness
    Upper end of the rate's 95% interval.
Eval/Exact_Answer_Low | fraction | judged probes | evaluation.exactness
    Lower end of the rate's 95% interval (Wilson).
Eval/Exact_Answer_High | fraction | judged probes | evaluation.exactness
    Upper end of the rate's 95% interval.
Eval/Budget_Hit_Rate_Low | fraction | generation probes | evaluation.exactness
    Lower end of the rate's 95% interval (Wilson).
Eval/Budget_Hit_Rate_High | fraction | generation probes | evaluation.exactness
    Upper end of the rate's 95% interval.
Eval/Term_Recall_Low | fraction | judged probes | evaluation.exactness
    Lower end of its 95% interval (Wilson's, of the mean as if it were a rate).
Eval/Term_Recall_High | fraction | judged probes | evaluation.exactness
    Upper end of its 95% interval.
Eval/Answer_Score_Low | fraction | judged probes | evaluation.exactness
    Lower end of its 95% interval (Wilson's, of the mean as if it were a rate).
Eval/Answer_Score_High | fraction | judged probes | evaluation.exactness
    Upper end of its 95% interval.
Eval/Fact_Recall_Low | fraction | judged probes | evaluation.exactness
    Lower end of its 95% interval (Wilson's, of the mean as if it were a rate).
Eval/Fact_Recall_High | fraction | judged probes | evaluation.exactness
    Upper end of its 95% interval.
Eval/Token_Accuracy_Error | fraction | evaluation | evaluation.loss_metrics
    Standard error of Eval/Token_Accuracy over the held-out samples.
Eval/Thinking_Loss_Error | nats/token | evaluation | evaluation.loss_metrics
    Standard error of Eval/Thinking_Loss over the held-out samples.
Eval/Answer_Loss_Error | nats/token | evaluation | evaluation.loss_metrics
    Standard error of Eval/Answer_Loss over the held-out samples.
Forgetting/General_Loss_Error | nats/token | measured forgetting | evaluation.loss_metrics
    Standard error of Forgetting/General_Loss over the general samples.
Eval/Perplexity | | evaluation | evaluation.evaluator
    exp(Eval/Loss).
Eval/By_Source/<name> | nats/token | evaluation | evaluation.evaluator
    Held-out loss on samples of one source file.
Eval/By_Category/<name> | nats/token | evaluation | evaluation.evaluator
    Held-out loss on samples by the category of most of their terms; none: without a term.
GPU_<i>/Throttle_SW_Power_Cap | 0 or 1 | GPU | monitoring.system_monitor
    Slowed down at some time since the last logged step to keep the power limit.
GPU_<i>/Throttle_HW_Slowdown | 0 or 1 | GPU | monitoring.system_monitor
    Slowed down at some time since the last logged step by the hardware (heat or power).
GPU_<i>/Throttle_SW_Thermal | 0 or 1 | GPU | monitoring.system_monitor
    Slowed down at some time since the last logged step by the driver because of heat.
GPU_<i>/Throttle_HW_Thermal | 0 or 1 | GPU | monitoring.system_monitor
    Slowed down at some time since the last logged step by the hardware because of heat.
GPU_<i>/Throttle_Power_Brake | 0 or 1 | GPU | monitoring.system_monitor
    Slowed down at some time since the last logged step by the power supply.
Throughput/Supervised_Tokens_Per_Second | tokens/s | always | training.step_clock
    Tokens with a loss over the time of the steps.
Throughput/Samples_Per_Second | samples/s | always | training.step_clock
    Samples over the time of the steps.
Throughput/Evaluation_Percent | % | always | training.step_clock
    Share of the session's time so far that evaluations took; without the one that follows.
Throughput/Saving_Percent | % | always | training.step_clock
    Share of the session's time so far that saving took; without the one that follows.
Throughput/Packing_Efficiency_Percent | % | always | data.packing
    Real tokens over token places in the rows.
Final_Config/<name> | | at the end | runs.metrics
    The other settings that are numbers.
Final_Monitoring/<name> | | at the end | runs.metrics
    Other numbers about convergence at the end.
Dataset/Broken_Samples | samples | always | analysis.statistics
    Entries that could not be read, or that the chat template refuses or changes.
Dataset/Avg_Thinking_Length | characters | always | analysis.statistics
    Mean length of the chains of thought.
Dataset/Avg_Answer_Length | characters | always | analysis.statistics
    Mean length of the answers.
Dataset/Thinking_Answer_Ratio_P50 | | always | analysis.statistics
    Median of thinking length over answer length.
Dataset/Quality_<name> | 0 to 1 | always | analysis.statistics
    Mean of one part of the quality score.
Dataset/Answer_Copied_Into_Thinking | samples | always | analysis.statistics
    Samples whose chain of thought holds the answer word by word.
Dataset/Citation_Conflicts | samples | always | analysis.statistics
    Samples that cite a standard under a wrong number or name.
Dataset/Exact_Duplicates | samples | always | analysis.statistics
    Samples that repeat another one exactly.
Dataset/Near_Duplicates | samples | always | analysis.statistics
    Samples that are nearly the same as another one.
Dataset/Conflicting_Answers | questions | always | analysis.statistics
    Questions that come with different answers.
Dataset/Train_Eval_Leaks | samples | always | analysis.statistics
    Held-out samples that are nearly the same as a training sample.
Dataset/<name>_Tokens_<name> | tokens | always | analysis.statistics
    Token lengths of prompt, thinking, answer and total: mean, p50, p90, p99, max.
Dataset/Exceeding_<k>_Percent | % | always | analysis.statistics
    Samples longer than k tokens.
Dataset/Advised_Max_Seq_Length | tokens | always | analysis.statistics
    Shortest usual sequence length that nearly all samples fit into.
Dataset/Packing_Efficiency_Percent | % | always | analysis.statistics
    Forecast of real tokens over token places when samples are packed.
Dataset/Truncated_Percent | % | always | analysis.statistics
    Samples longer than the longest sequence; what became of them: Dropped.
Dataset/Lost_Think_Close | samples | always | analysis.statistics
    Samples that would lose </think> by a plain cut, which nothing here does.
Dataset/Lost_Answer | samples | always | analysis.statistics
    Samples that would lose answer, or a part of it, by a plain cut.
Dataset/Lost_EOS | samples | always | analysis.statistics
    Samples that would lose their end by a plain cut.
Dataset/Dropped | samples | always | analysis.statistics
    Samples left out because they are too long.
Dataset/Control_Tokens | samples | always | analysis.statistics
    Samples whose text holds control tokens of the chat template.
LoRA/<name>/Update_Ratio | | evaluation | evaluation.adapter_health
    Norm of the LoRA update over the norm of the frozen weight, mean over the layers.
LoRA/<name>/Effective_Rank | | evaluation after step 0 | evaluation.adapter_health
    Effective rank of the update, at most lora_r, mean over the layers.
LoRA/<name>/Gradient_Norm | | evaluation after step 0 | evaluation.adapter_health
    Gradient norm of A and B together before clipping, mean over the layers.
"""
TEXTS = """
Dataset/Summary | Markdown | always | analysis.statistics
    The data set in tables.
Dataset/Mask_Audit | Markdown | always | data.mask_audit
    Samples with every token's segment, to see what is trained.
Training/Epoch_Summary | Markdown | always | runs.metrics
    An epoch in a table.
Training/Final_Summary | Markdown | at the end | runs.metrics
    The whole run in tables.
Config/Training_Settings | Markdown | always | runs.metrics
    All settings.
GPU/Throttling | Markdown | GPU | runs.gpu_summary
    What has slowed which device down so far, and in how many logged steps.
Alerts/Table | Markdown | alerts | monitoring.alerts
    All alerts so far.
Eval/Samples | Markdown | generation probes | evaluation.generation
    Generated answers beside the reference.
Eval/Hardest_Samples | Markdown | evaluation | evaluation.hardest_samples
    Held-out samples with the highest loss.
Training/Hardest_Samples | Markdown | evaluation, end of an epoch | evaluation.hardest_samples
    Training samples of this epoch whose loss was furthest above that of the steps around them.
LoRA/Modules | Markdown | evaluation | evaluation.adapter_health
    Update ratio, effective rank and gradient norm of every adapted layer.
"""
HISTOGRAMS = """
Model/Weights_Distribution | | logged weights | evaluation.adapter_health
    Trainable weights.
LoRA/A | | logged weights | evaluation.adapter_health
    Weights of all A matrices.
LoRA/B | | logged weights | evaluation.adapter_health
    Weights of all B matrices.
LoRA/<name>/Update_Ratio_Histogram | | evaluation | evaluation.adapter_health
    Update ratio of the layers, one projection a chart.
Dataset/<name>_Histogram | | always | analysis.statistics
    Distribution over the samples.
"""
IMAGES = """
Dataset/Length_Distribution | | always | analysis.statistics
    Lengths of prompt, thinking and answer.
Dataset/Term_Distribution | | always | analysis.statistics
    Most frequent cryptographic terms.
LoRA/Update_Ratio_Map | | evaluation | evaluation.adapter_health
    Update ratio by layer and projection.
"""
